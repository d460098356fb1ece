package wire

import (
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/msgval"
)

// PartitionMapRequest is PARTITION_MAP_REQUEST, from a client in cluster mode:
// PROTOCOL 18.2.
type PartitionMapRequest struct {
	CurrentVersion uint64 // 0: not said
}

// PartitionMap is PARTITION_MAP, from a server, with one node that owns all
// partitions (PROTOCOL 18.3). A map of several nodes is decoded as Other.
type PartitionMap struct {
	Version      uint64
	NodeID       string
	WebSocketURL string
	HTTPURL      string // empty: left out
	GeneratedAt  uint64 // Unix ms
}

// Type implements Message.
func (m *PartitionMapRequest) Type() string { return "PARTITION_MAP_REQUEST" }

// AppendTo implements Message.
func (m *PartitionMapRequest) AppendTo(dst []byte) []byte {
	return appendNumber(appendWrapped(dst, m.Type(), 1), "currentVersion", m.CurrentVersion)
}

const typePartitionMap = "PARTITION_MAP"

// Type implements Message.
func (m *PartitionMap) Type() string { return typePartitionMap }

// AppendTo implements Message.
func (m *PartitionMap) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), 5)
	dst = appendNumber(dst, "version", m.Version)
	dst = appendNumber(dst, "partitionCount", keyspace.PartitionCount)
	dst = appendArray(dst, "nodes", 1)
	dst = msgval.AppendMapHeader(dst, 3)
	dst = appendText(dst, "nodeId", m.NodeID)
	dst = appendMap(dst, "endpoints", pairs(1, m.HTTPURL != ""))
	dst = appendText(dst, "websocket", m.WebSocketURL)
	if m.HTTPURL != "" {
		dst = appendText(dst, "http", m.HTTPURL)
	}
	dst = appendText(dst, "status", "ACTIVE")
	dst = appendArray(dst, "partitions", keyspace.PartitionCount)
	for id := range uint64(keyspace.PartitionCount) {
		dst = msgval.AppendMapHeader(dst, 3)
		dst = appendNumber(dst, "partitionId", id)
		dst = appendText(dst, "ownerNodeId", m.NodeID)
		dst = appendArray(dst, "backupNodeIds", 0)
	}
	return appendNumber(dst, "generatedAt", m.GeneratedAt)
}

// partitionMapRequest reads a request, which may do without a payload.
func (d *decoder) partitionMapRequest(env envelope) (Message, *Error) {
	m := new(PartitionMapRequest)
	if env.payload.data == nil {
		return m, nil
	}
	d.reader = env.payload
	if d.isNil() {
		return m, nil
	}
	err := d.fields("payload", func(key []byte) *Error {
		if string(key) == "currentVersion" {
			return d.count("currentVersion", &m.CurrentVersion)
		}
		d.skip()
		return nil
	})
	return m, err
}

// partitionMap reads a map of one node, and returns none if it is another.
func (d *decoder) partitionMap() (Message, *Error) {
	m := new(PartitionMap)
	var nodes int
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "version":
			return d.count("version", &m.Version)
		case "generatedAt":
			return d.count("generatedAt", &m.GeneratedAt)
		case "nodes":
			n, ok := d.arrayHeader()
			if !ok {
				return badMessage("nodes must be an array")
			}
			nodes = n
			for range n {
				if err := d.partitionNode(m); err != nil {
					return err
				}
			}
			return nil
		}
		d.skip()
		return nil
	})
	if err == nil && nodes != 1 {
		return nil, nil
	}
	return m, err
}

func (d *decoder) partitionNode(m *PartitionMap) *Error {
	m.NodeID, m.WebSocketURL, m.HTTPURL = "", "", ""
	return d.fields("an element of nodes", func(key []byte) *Error {
		switch string(key) {
		case "nodeId":
			return d.serverText("nodeId", &m.NodeID)
		case "endpoints":
			return d.fields("endpoints", func(key []byte) *Error {
				switch string(key) {
				case "websocket":
					return d.serverText("websocket", &m.WebSocketURL)
				case "http":
					return d.serverText("http", &m.HTTPURL)
				}
				d.skip()
				return nil
			})
		}
		d.skip()
		return nil
	})
}
