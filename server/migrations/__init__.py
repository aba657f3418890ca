"""How a store of an earlier Umbel becomes one of this: one step a file, carried out by alembic."""
