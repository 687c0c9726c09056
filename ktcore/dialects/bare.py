"""Models whose template names tools and no marks: an answer that is a JSON object is a call."""

from __future__ import annotations

from ktcore.dialects.base import ToolFormat
from ktcore.dialects.reading import tagged

BARE = ToolFormat("bare", (), (), tagged(""), '{"name": "{name}", "arguments": {arguments}}', bare=True)
