"""All modules with semantics: importing this one fills the table."""
