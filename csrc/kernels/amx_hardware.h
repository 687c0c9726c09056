// The tile registers of the CPU, held from construction to destruction: a thread outside a panel carries no tile state
// that a context switch would have to save. Assembly, because the compilers' intrinsics want tile numbers as literal
// tokens and GCC's loads do not tell the optimiser that they read memory. Inside the unit's namespace.
class Tiles {
  public:
    explicit Tiles(const TileConfig& config) { _tile_loadconfig(&config); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int T>
    AI void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    template <int T>
    AI void load(const void* p, size_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    AI void store(void* p, size_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    // C += A * B, signed bytes times unsigned or signed bytes, to 32 bits.
    template <int C, int A, int B>
    AI void dot_su() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
    template <int C, int A, int B>
    AI void dot_ss() {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
    // C += A * B, pairs of bfloat16, to floats.
    template <int C, int A, int B>
    AI void dot_bf() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};
