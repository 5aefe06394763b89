"""What an adapter is and does: its parameters, shares, spectra, pictures; and what one would cost."""
