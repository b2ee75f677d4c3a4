"""Plans of the rows that ``runtime_speed.py`` measures."""
