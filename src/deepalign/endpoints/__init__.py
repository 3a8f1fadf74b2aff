"""Everything that talks HTTP to an OpenAI-compatible endpoint; knows no run, no attack and no judge."""
