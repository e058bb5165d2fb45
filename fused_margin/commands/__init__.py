"""The commands of `fused-margin`, one module each; `fused_margin.cli` imports the module of the command that runs."""
