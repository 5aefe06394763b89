"""Files and texts from outside: read within limits, written whole or not at all."""
