"""What must not go silently wrong: damaged, hostile and odd input, killed and starved runs.

``make faults`` runs all of it; without ``FAULTS=full`` in the environment each count is small.
"""

from __future__ import annotations

import os

FULL = os.environ.get("FAULTS") == "full"
