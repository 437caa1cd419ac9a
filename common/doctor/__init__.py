"""What the doctor asks of a machine, and what it makes of the answers."""
