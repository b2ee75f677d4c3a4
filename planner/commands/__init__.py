"""One module for each command of ``planner``, loaded when it is called."""
