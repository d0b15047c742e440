"""The quickstart: adapters of four kinds learn word problems on the embedded base, in minutes."""
