"""A server that embeds, answers and speaks, with one model in memory."""
