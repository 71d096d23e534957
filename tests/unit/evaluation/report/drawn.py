"""What a page draws."""

import json
import re
from typing import Any


def drawn(text: str) -> list[dict[str, Any]]:
    """The data of every chart of a page, in order."""
    return [json.loads(data) for data in re.findall(r'<script type="application/json">(.*?)</script>', text)]
