"""What `depthkit inspect` knows: one module each for looking at samples, flat surfaces, contradictions, duplicates and
the page."""
