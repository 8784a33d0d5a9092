"""How source text is counted: what ends a line."""

from __future__ import annotations

import re

LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""What libyaml counts as the end of a line."""
