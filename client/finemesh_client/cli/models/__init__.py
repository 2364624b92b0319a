"""Models, their limits and endpoints, and a chat with them. It knows no job."""
