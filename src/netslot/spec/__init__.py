"""What a person wrote: the spec file, rule files and variables as frozen, checked values. Touches no kernel."""
