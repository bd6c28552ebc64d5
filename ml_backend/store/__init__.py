"""What is remembered: tables in a database, model versions in a registry of folders."""
