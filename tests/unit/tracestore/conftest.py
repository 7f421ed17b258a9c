"""Databases for tests of the store: fixtures of `databases`."""

from databases import empty_file, postgres_database, postgres_url, store_url

__all__ = ["empty_file", "postgres_database", "postgres_url", "store_url"]
