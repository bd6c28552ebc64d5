"""What is remembered: tables in a database, model versions in folders or a bucket."""
