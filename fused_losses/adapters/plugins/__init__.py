"""Modules whose import installs an adapter, for frameworks that load plugins by naming a module to import."""
