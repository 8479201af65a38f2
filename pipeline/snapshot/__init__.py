"""The database beside a MsgSnap: sent, received, stored."""
