package merkle

import (
	"unicode/utf8"

	"github.com/topgun-sync/topgun/core/hlc"
)

const (
	fnvOffset = 2166136261
	fnvPrime  = 16777619
)

// Hash is FNV-1a, 32 bit, over the UTF-16 code units of s (PROTOCOL 7.1). Bytes
// that are not UTF-8 count as U+FFFD each, which is what a client makes of them
// when it decodes the string. It does not allocate.
func Hash(s string) uint32 { return hashOn(fnvOffset, s) }

// HashBytes is Hash of the string with these bytes.
func HashBytes(b []byte) uint32 { return hashOn(fnvOffset, b) }

// Extend continues a hash with the code units of a string: Extend(Hash(s), t) is
// Hash(s + t), where s ends with a whole character.
func Extend[T string | []byte](h uint32, s T) uint32 { return hashOn(h, s) }

// ExtendByte is Extend by one ASCII character.
func ExtendByte(h uint32, c byte) uint32 { return (h ^ uint32(c)) * fnvPrime }

// hashOn continues the hash h with the code units of s.
func hashOn[T string | []byte](h uint32, s T) uint32 {
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			return hashUTF16(h, s[i:])
		}
		h = (h ^ uint32(s[i])) * fnvPrime
	}
	return h
}

func hashUTF16[T string | []byte](h uint32, s T) uint32 {
	for _, r := range string(s) { // the compiler does not copy a []byte here
		if r >= 0x10000 {
			r -= 0x10000
			h = (h ^ uint32(0xd800+r>>10)) * fnvPrime
			r = 0xdc00 + r&0x3ff
		}
		h = (h ^ uint32(r)) * fnvPrime
	}
	return h
}

// ItemHash is the hash of one record (PROTOCOL 7.4): Hash of
// "key:millis:counter:node". Value and ttl play no part. It does not allocate.
func ItemHash(key string, ts hlc.Timestamp) uint32 {
	return ItemHashOf(Hash(key), ts)
}

// ItemHashOf is ItemHash for a caller that already has the Hash of the key.
func ItemHashOf(keyHash uint32, ts hlc.Timestamp) uint32 {
	h := (keyHash ^ ':') * fnvPrime
	h = hashDecimal(h, ts.Millis)
	h = (h ^ ':') * fnvPrime
	h = hashDecimal(h, ts.Counter)
	h = (h ^ ':') * fnvPrime
	return hashOn(h, ts.NodeID)
}

// hashDecimal continues h with n in plain decimal.
func hashDecimal(h uint32, n uint64) uint32 {
	var digits [20]byte
	i := len(digits)
	for {
		i--
		digits[i] = byte('0' + n%10)
		n /= 10
		if n == 0 {
			break
		}
	}
	for _, d := range digits[i:] {
		h = (h ^ uint32(d)) * fnvPrime
	}
	return h
}

// Mix is the finaliser of murmur3 (PROTOCOL 7.2). Mix(0) is 0.
func Mix(h uint32) uint32 {
	h ^= h >> 16
	h *= 0x85ebca6b
	h ^= h >> 13
	h *= 0xc2b2ae35
	h ^= h >> 16
	return h
}

// Leaf returns the number of the leaf that holds a key: the first three hex
// digits of the key's hash (PROTOCOL 7.3).
func Leaf(keyHash uint32) int { return int(keyHash >> 20) }
