"""Every norm, one family a file: rows over the verbs. `jaxnorm.table` lists them."""
