"""Models: their families as data, the anatomy of a live one, and how it is cut."""
