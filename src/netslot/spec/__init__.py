"""What a person wrote: the spec file, rule files and their variables, as frozen, checked values. Touches no kernel."""
