"""A database for tests of the store on PostgreSQL: a fixture of `databases`."""

from databases import postgres_database

__all__ = ["postgres_database"]
