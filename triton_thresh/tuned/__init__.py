"""Block sizes measured per device, one JSON file each (see tuning.py)."""
