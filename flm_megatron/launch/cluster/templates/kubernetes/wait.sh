# Pods start minutes apart, and torchrun waits for the first one for two minutes only: wait until that listens.
if [[ $JOB_COMPLETION_INDEX != 0 ]]; then
  trap 'exit 3' TERM
  first={{first}}
  until ((SECONDS > 1800)) || timeout 5 bash -c ": </dev/tcp/$first/{{port}}" 2>/dev/null; do sleep 2; done
fi
