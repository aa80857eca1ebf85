"""What a user types: one file a command, which checks what was asked and calls the library. `cli` reads the options."""
