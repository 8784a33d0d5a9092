"""The profile language: YAML with places, templates, inheritance, and the schema it must meet."""
