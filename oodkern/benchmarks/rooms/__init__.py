"""The cases of each room of ops: functions of sizes, dtype and passes, with every contender's code."""
