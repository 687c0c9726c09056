"""What every route stands on: the application, its gate, errors, logs, metrics and settings."""
