"""PBS attention inside other engines. Each has a package, which is imported only when it is
used."""
