package wire

import (
	"strings"
	"unicode/utf8"
)

const (
	maxMapName = 128
	maxKey     = 512
	maxNodeID  = 128
	maxID      = 128 // ids of operations, queries, requests
)

// CheckMapName returns why a map must not have this name, or nil: a name is 1 to
// 128 ASCII letters, digits, '_', '.', ':' and '-', begins with a letter or '_', and
// holds no "..". Younger clients of the original refuse ':' by themselves; older ones
// have maps named with it. Names that begin with _topgun_ or __topgun_ in any case, and
// names that mean something to JavaScript objects, are reserved. Do not return
// the result as an error without a look: a nil *Error is no nil error.
func CheckMapName(name string) *Error {
	if len(name) == 0 || len(name) > maxMapName || !nameStart(name[0]) || strings.Contains(name, "..") {
		return badName()
	}
	for i := range len(name) {
		if c := name[i]; !nameStart(c) && (c < '0' || c > '9') && c != '.' && c != ':' && c != '-' {
			return badName()
		}
	}
	if name[0] == '_' && (hasPrefixFold(name, "_topgun_") || hasPrefixFold(name, "__topgun_")) || reserved(name) {
		return reservedName("the map name is reserved")
	}
	return nil
}

func badName() *Error {
	return &Error{Name: BadName, Code: 400, Text: "a map name is 1 to 128 letters, digits, '_', '.', ':' and '-', begins with a letter or '_', and holds no '..'"}
}

func reservedName(text string) *Error { return &Error{Name: ReservedName, Code: 400, Text: text} }

func nameStart(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_'
}

func hasPrefixFold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}

// protoField is a field that the TypeScript client renames when it decodes a
// map.
const protoField = "__proto__"

func reserved(name string) bool {
	switch name {
	case protoField, "constructor", "prototype":
		return true
	}
	return false
}

// CheckKey returns why a record must not have this key, or nil: a key is 1 to
// 512 bytes of UTF-8 without NUL. Keys that mean something to JavaScript objects
// are reserved. As with CheckMapName, a nil *Error is no nil error.
func CheckKey(key string) *Error {
	if len(key) == 0 || len(key) > maxKey || strings.IndexByte(key, 0) >= 0 || !utf8.ValidString(key) {
		return &Error{Name: BadKey, Code: 400, Text: "a key is 1 to 512 bytes of UTF-8 without NUL"}
	}
	if reserved(key) {
		return reservedName("the key is reserved")
	}
	return nil
}

// checkNodeID returns why a client's stamp must not have this node id, or nil.
func checkNodeID(id string) *Error {
	if len(id) > maxNodeID {
		return badTimestamp("a nodeId is 1 to 128 bytes of UTF-8")
	}
	if err := checkStoredNodeID(id); err != nil {
		return err
	}
	if serverNode(id) {
		return badTimestamp("the nodeId is one that servers stamp with")
	}
	return nil
}

// checkStoredNodeID returns why no stamp has this node id, of a client or of a
// server, or nil.
func checkStoredNodeID(id string) *Error {
	if len(id) == 0 || len(id) > maxStoredNodeID || !utf8.ValidString(id) {
		return badTimestamp("a nodeId is 1 to 128 bytes of UTF-8")
	}
	for i := range len(id) {
		if c := id[i]; c == ':' || c < 0x20 || c == 0x7f {
			return badTimestamp("a nodeId holds no ':' and no control characters")
		}
	}
	return nil
}

func badTimestamp(text string) *Error {
	return &Error{Name: BadTimestamp, Code: 400, Text: text}
}

// serverNode reports whether id is "topgun-" and digits: what a shard stamps
// with. A client that used it could make stamps equal to a server's.
func serverNode(id string) bool {
	digits, ok := strings.CutPrefix(id, "topgun-")
	return ok && digits != "" && strings.Trim(digits, "0123456789") == ""
}

// maxResourceName bounds the name of a topic, counter or lock.
const maxResourceName = 256

// CheckResourceName returns why a topic, a counter or a lock must not have this
// name, or nil: a name is 1 to 256 ASCII letters, digits, '_', '.', ':', '/' and
// '-', and holds no "..". As with CheckMapName, a nil *Error is no nil error.
func CheckResourceName(name string) *Error {
	if len(name) == 0 || len(name) > maxResourceName || strings.Contains(name, "..") {
		return badResourceName()
	}
	for i := range len(name) {
		if c := name[i]; !nameStart(c) && (c < '0' || c > '9') && c != '.' && c != ':' && c != '/' && c != '-' {
			return badResourceName()
		}
	}
	return nil
}

func badResourceName() *Error {
	return &Error{Name: BadName, Code: 400, Text: "the name of a topic, counter or lock is 1 to 256 letters, digits, '_', '.', ':', '/' and '-', and holds no '..'"}
}

// idRule is what validID wants, for texts of errors.
const idRule = "1 to 128 bytes of UTF-8 without NUL"

// validID reports whether a client may use this id for an operation or a query:
// it is sent back, in msgpack or JSON.
func validID(id string) bool {
	return 0 < len(id) && len(id) <= maxID && strings.IndexByte(id, 0) < 0 && utf8.ValidString(id)
}
