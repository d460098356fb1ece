// Package wire is the client protocol as bytes: the frames of the WebSocket
// (PROTOCOL 2 to 14, 16.1 and 18), the bodies of POST /sync (PROTOCOL 17), and the
// rules for names, keys, tags, stamps and sizes. It decodes and encodes both
// directions, for servers and for clients. It holds no state and knows no
// connection: what a frame means is its callers' business.
//
// # Bytes and strings
//
// A decoded message aliases its frame: values, other raw msgpack, and the ids of
// operations and queries point into it. The frame must not be changed or reused
// while the message is in use, and what is kept longer must be cloned. Keys, map
// names, node ids and tags are copies, so that keeping them does not keep the
// frame; within a frame equal map names and equal node ids share one copy, and so
// do equal lists of tombstones. The tags of such a list keep the whole list.
//
// # Errors
//
// The Decode functions return *Error and nothing else: a fixed text that never
// repeats input. An operation or request that is broken on its own, in a frame
// that is otherwise sound, carries its *Error with it, so that the rest is not
// lost and the answer can name it.
//
// Wherever the protocol means an integer, int, uint and integral floats from 0
// to 2^53 are read alike.
package wire
