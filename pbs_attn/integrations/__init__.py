"""PBS attention inside other engines, one package each; none is imported before it is asked for."""
