// While `flm report --serve` runs: asks for what is new, and draws it where the reader is.
"use strict";
(() => {
  const status = document.querySelector("#status");
  let version = "";
  const update = async () => {
    try {
      const answer = await fetch("main", { headers: version ? { "If-None-Match": version } : {}, cache: "no-store" });
      if (answer.status === 200) {
        const open = [...document.querySelectorAll("main details")].map((part) => part.open);
        document.querySelector("main").innerHTML = await answer.text();
        document.querySelectorAll("main details").forEach((part, i) => (part.open = open[i] ?? false));
        version = answer.headers.get("ETag");
        Charts.drawAll();
      } else if (answer.status !== 304) throw new Error(await answer.text());
      status.textContent = `live, ${new Date().toLocaleTimeString()}`;
    } catch (error) {
      status.textContent = `not updated: ${error.message}`;
    }
    setTimeout(update, 5000);
  };
  update();
})();
