"""Models of sound."""

from __future__ import annotations

SPEECH = ()
