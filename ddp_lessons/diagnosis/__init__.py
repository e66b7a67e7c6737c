"""Why a run failed or hung, from its record. Runs in the parent."""
