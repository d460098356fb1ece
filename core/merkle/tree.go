// Package merkle holds the hashes of PROTOCOL section 7: the string hash, the
// item hash of a last-writer-wins record, additive leaf sums, and the tree of
// depth 3 over them. It holds no records. It speaks both rules of combining
// hashes, the present one and the one of clients before 2026-06-15.
//
// The tree tells clients apart, it does not protect them: 32-bit hashes over key
// and stamp only are what deployed clients compute.
package merkle

const (
	// Depth is the length of a leaf's path in hex digits.
	Depth = 3
	// LeafCount is the number of leaves, 16 to the power of Depth.
	LeafCount = 4096
)

// Combine is the rule by which the hashes of children make the hash of a node.
type Combine uint8

const (
	// Mixed sums Mix of each hash: PROTOCOL 7.2.
	Mixed Combine = iota
	// Plain sums the hashes as they are, for the clients of PROTOCOL 7.7.
	Plain
)

// term is what a hash contributes to the sum of its node.
func (c Combine) term(h uint32) uint32 {
	if c == Plain {
		return h
	}
	return Mix(h)
}

// Tree is the tree over a state of Leaves. It does not change and may be read
// concurrently.
type Tree struct {
	root   uint32
	level1 [16]uint32
	level2 [256]uint32
	level3 [LeafCount]uint32
}

// NewTree computes the tree of the leaves as they are, which must have been made
// with the same Combine. Later changes of l do not reach it.
func NewTree(l *Leaves, c Combine) *Tree {
	t := new(Tree)
	for leaf, sum := range l.All() {
		t.level3[leaf] = sum
		t.level2[leaf>>4] += c.term(sum)
	}
	for i, h := range t.level2 {
		t.level1[i>>4] += c.term(h)
	}
	for _, h := range t.level1 {
		t.root += c.term(h)
	}
	return t
}

// Root returns the hash of the whole map, 0 if it is empty.
func (t *Tree) Root() uint32 { return t.root }

// Hash returns the hash of the node at a path, 0 if there is none or path is not
// a path.
func (t *Tree) Hash(path string) uint32 {
	n, ok := parsePath(path)
	if !ok {
		return 0
	}
	switch len(path) {
	case 0:
		return t.root
	case 1:
		return t.level1[n]
	case 2:
		return t.level2[n]
	}
	return t.level3[n]
}

// Buckets returns the non-zero children of the node at a path of length 0 to 2:
// the hex digit of each, ascending, as a lowercase ASCII character, and its
// hash. It returns false if path is no such path.
func (t *Tree) Buckets(path string) (digits []byte, hashes []uint32, ok bool) {
	n, ok := parsePath(path)
	if !ok || len(path) >= Depth {
		return nil, nil, false
	}
	var level []uint32
	switch len(path) {
	case 0:
		level = t.level1[:]
	case 1:
		level = t.level2[n<<4:][:16]
	case 2:
		level = t.level3[n<<4:][:16]
	}
	for i, h := range level {
		if h != 0 {
			digits = append(digits, "0123456789abcdef"[i])
			hashes = append(hashes, h)
		}
	}
	return digits, hashes, true
}

// LeafRange returns the first and the last leaf below a path of 0 to 3 lowercase
// hex digits, and false if path is no such path.
func LeafRange(path string) (first, last int, ok bool) {
	n, ok := parsePath(path)
	if !ok {
		return 0, 0, false
	}
	shift := 4 * (Depth - len(path))
	return n << shift, (n+1)<<shift - 1, true
}

// parsePath reads a path as a number of len(path) hex digits.
func parsePath(path string) (n int, ok bool) {
	if len(path) > Depth {
		return 0, false
	}
	for i := range len(path) {
		switch c := path[i]; {
		case '0' <= c && c <= '9':
			n = n<<4 | int(c-'0')
		case 'a' <= c && c <= 'f':
			n = n<<4 | int(c-'a'+10)
		default:
			return 0, false
		}
	}
	return n, true
}
