"""Raw files of any kind -> one lazy frame with the columns that a script wants."""
