"""disranker: click logs into fast rankers. What things are; `jobs/` and `serve/` run it on Ray."""
