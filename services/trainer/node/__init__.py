"""The machine under the agent: its devices and its work folders. It knows neither jobs nor the network."""
