"""The contract: topics, Avro schemas, tables, code tables, closed lists. Imports nothing else of the project."""
