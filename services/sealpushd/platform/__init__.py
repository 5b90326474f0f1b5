"""What every service stands on: settings, logs, metrics, errors, access, servers, clients, database, vault."""
