"""The documentation site: pages, and what they show that is made when they are built."""
