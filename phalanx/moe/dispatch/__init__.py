"""Ways tokens travel to their experts and back; one file per kind."""
