"""An empty store for each test: fixtures of `databases`."""

from databases import empty_file, store, store_url

__all__ = ["empty_file", "store", "store_url"]
