"""Stores as a shared asset: copy, select, merge, add, export, describe and list them."""
