"""Latency measured on this device, as a cost: the table and its maths, the timing, the cache, the check of a cut."""
