"""The writing side of tracking: how a run gets into MLflow. Not here: reading runs (`runs`)."""
