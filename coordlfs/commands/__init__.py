"""What a user types. Each command is one module; only they print, and only they turn errors into an exit status."""
